"""Fast ranking on a CPU: oneDNN-prepacked weights and compiled attention."""
