"""Choose an option for every unit: measure each option's loss, choose under a budget, improve it on the complete model."""
