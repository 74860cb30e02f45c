"""What does the policy say, and with what log-probabilities?"""
