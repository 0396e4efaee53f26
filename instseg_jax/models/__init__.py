"""What the network is: Flax Linen modules, the table of sizes, initial values."""
