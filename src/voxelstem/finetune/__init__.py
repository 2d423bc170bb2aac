"""Fine-tuning: a pretrained network and a head above it learn together from few labels."""
