"""Networks behind one contract, and the roles that share them."""
