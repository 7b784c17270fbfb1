"""What the config leaves open, decided: the cut, the plan of `auto`, rematerialisation; and the memory prediction."""
