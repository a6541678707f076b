"""How a model is run: RuntimeConfig, and the command-line arguments that every command which runs one has.

Data only: loading.py acts on it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlxmoe.arguments import add_model_arguments
from mlxmoe.errors import UserError
from mlxmoe.kernels import MetalKernels, ReferenceKernels
from mlxmoe.lookahead import PREDICTORS
from mlxmoe.policies import OFFLINE, POLICIES, CacheChoice, Policy, load_choice
from mlxmoe.units import parse_size

DEFAULT_CONTEXT = 8192  # tokens that memory is reserved for when nobody says
DEFAULT_POLICY = "lfu"
_ONLINE = tuple(name for name in POLICIES if name not in OFFLINE)


@dataclass(frozen=True)
class RuntimeConfig:
    """`memory`: hard ceiling in bytes over weights, KV cache and buffers (None: what the machine offers). `context`:
    tokens to reserve memory for (None: the model's, at most DEFAULT_CONTEXT)."""

    memory: int | None = None
    context: int | None = None
    # Exact streaming even where a reduced model would fit: every expert at its written precision, read when it is missing.
    exact: bool = False
    # Of streaming. `policy`: who leaves memory, a name in policies.POLICIES or what `mlxmoe explain --save` has chosen.
    # `prefetch`: which experts are read ahead where that is measured to pay (lookahead.PREDICTORS). `threads` and `direct`
    # (reads past the page cache): None lets a probe of the disk decide.
    policy: str | CacheChoice = DEFAULT_POLICY
    prefetch: str = "auto"
    # Share of what a layer's experts may take, beyond one token's, that goes to its most frequent experts for good.
    pin: float = 0.0
    threads: int | None = None
    direct: bool | None = None
    # For measurements: bytes per second that reads are slowed down to, as by a slower disk.
    read_rate: float | None = None
    # Of a reduced model: experts that are chosen often exchange precision with others while it runs. Then output depends on
    # what was said before.
    adapt: bool = False
    # What a converted folder's experts run on. "auto": on a Metal GPU on which they were checked and are the faster ones,
    # the project's kernels (kernel_choice.py); None: MLX's built-in products.
    kernels: MetalKernels | ReferenceKernels | Literal["auto"] | None = "auto"

    def make_policy(
        self, layer: int, num_experts: int, slots: int, frequencies: Sequence[float] | None = None
    ) -> Policy:
        """The policy object of one layer. `frequencies`: how often each expert is chosen, or what stands for that. Raises
        UserError for a choice that was made for another model, and for "static" where there are no frequencies."""
        if self.policy == "static":
            if frequencies is None:
                raise UserError(
                    "the static policy has nothing to go by: this checkpoint says nothing of its experts",
                    "trace it: mlxmoe explain MODEL --save FILE, then --policy FILE; or take another policy",
                )
            return POLICIES["static"](num_experts, slots, frequencies=frequencies)
        if isinstance(self.policy, str):
            return POLICIES[self.policy](num_experts, slots)
        known = {choice.layer for choice in self.policy.layers}
        if layer not in known or self.policy.num_experts != num_experts:
            raise UserError(
                f"the cache choice is for {self.policy.num_experts} experts in layers {min(known)} to {max(known)}, "
                f"layer {layer} of this model has {num_experts}",
                "make one for this model: mlxmoe explain MODEL --save FILE",
            )
        return self.policy.make(layer, slots)


DEFAULTS = RuntimeConfig()


def add_runtime_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, --memory, --context and how experts are streamed."""
    add_model_arguments(parser)
    parser.add_argument(
        "--exact",
        action="store_true",
        help="never reduce an expert's precision: read missing ones from disk while the model runs (default: reduce "
        "precision first, read only where not even the base planes fit)",
    )
    parser.add_argument(
        "--adapt",
        action="store_true",
        help="let experts that are chosen often take precision from others while a reduced model runs (default: precision "
        "stays, so that the same prompt gives the same answer)",
    )
    parser.add_argument(
        "--policy",
        default=DEFAULT_POLICY,
        metavar="NAME",
        help=f"which expert leaves memory when others are read: {', '.join(_ONLINE)}, or a file of mlxmoe explain --save "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--pin",
        type=float,
        default=RuntimeConfig.pin,
        metavar="SHARE",
        help="share of the room for streamed experts that the most frequent ones keep for good (default: %(default)s)",
    )
    parser.add_argument(
        "--prefetch",
        default="auto",
        choices=PREDICTORS,
        help="what experts are read ahead by, where that is measured to pay (default: %(default)s)",
    )


def runtime_config(args: argparse.Namespace) -> RuntimeConfig:
    """What add_runtime_arguments has read. Raises UserError for a size or a policy that is none."""
    memory = parse_size(args.memory) if args.memory is not None else None
    policy: str | CacheChoice = args.policy
    if args.policy not in _ONLINE:
        if not Path(args.policy).exists():
            raise UserError(
                f"there is no cache policy {args.policy!r}, and no file of that name",
                f"one of {', '.join(_ONLINE)}, or a file of mlxmoe explain --save",
            )
        policy = load_choice(Path(args.policy))
    if not 0 <= args.pin <= 1:
        raise UserError(f"--pin {args.pin:g} is not a share", "give a number from 0 to 1")
    return RuntimeConfig(memory, args.context, args.exact, policy, args.prefetch, args.pin, adapt=args.adapt)
