"""What runs inside the sandbox. Standard library only: the interpreter there sees nothing else."""
