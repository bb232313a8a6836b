"""Ways of using the library, a file each: every one ends in an equality with the run without it, or by autograd."""
