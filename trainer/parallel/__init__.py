"""One learner over many processes: ranks, how they share rows and weights, and how rank 0 leads them."""
