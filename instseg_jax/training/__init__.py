"""How the network learns: matching, losses, optimizer, state, steps and the loop around them."""
