"""What is stored: blends, deltas, modules, backbones, banks. Tensors and files; no model is run."""
