"""Train what other passes rounded or left."""
