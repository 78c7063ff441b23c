"""Memory of the learner: what it will take, what it recomputes, and where its state is between calls."""
