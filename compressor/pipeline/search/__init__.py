"""Which option every unit takes: measure what each loses, choose under a budget, improve the choice as a whole."""
