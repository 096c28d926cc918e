"""Questions with right answers: what lm-evaluation-harness runs, what lies in local files, and our own without a network."""
