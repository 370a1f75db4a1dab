"""Everything on one machine: what `./dev up` and `./dev demo` are made of."""
