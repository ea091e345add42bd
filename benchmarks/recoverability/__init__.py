"""Which layers recover best? Every choice recovered, on small real data, against what each criterion would choose."""
