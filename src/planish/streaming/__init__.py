"""Models larger than memory: their weights come from safetensors and go to the artifact piece by piece."""
