"""The perceptual encoders that configs can name."""
