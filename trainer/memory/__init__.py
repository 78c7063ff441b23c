"""Memory: estimates before a run; offload and low-memory learners plug in here."""
