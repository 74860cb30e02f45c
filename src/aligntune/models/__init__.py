"""What is trained, what is frozen, in what precision, with which adapters and kernels?"""
