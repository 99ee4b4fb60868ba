"""Does the artifact compute what the model computes? Parity with PyTorch at fp32, fidelity of what is quantized."""
