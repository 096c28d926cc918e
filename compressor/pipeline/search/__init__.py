"""Choose an option for every unit: measure what each loses, choose under a budget, improve the choice as a whole."""
