"""What the guarantee rests on. Knows tensors and numbers, never a language model."""
