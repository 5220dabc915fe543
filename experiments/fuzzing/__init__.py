"""Random traces, bodies, constraints and answers, checked against what must hold."""
