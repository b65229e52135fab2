"""Many runs on the embedded world: the paper's questions, answered with paired tests."""
