"""What objectives share whose answers are sampled during training: the sampler, rewards of answers, rounds, data."""
