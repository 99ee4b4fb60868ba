"""Which artifact is enough? Size, memory, speed and quality of several, side by side, and the smallest that will do."""
