"""The converter: Hugging Face checkpoint in, per-expert mixed-precision folder out. One file per stage."""
