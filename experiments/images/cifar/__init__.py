"""CIFAR-10: 60,000 photographs of 32 × 32 pixels in ten classes (Krizhevsky, 2009)."""
