"""Many runs on the embedded world, which answer the paper's questions with paired tests."""
