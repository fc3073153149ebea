"""Random programs, plan files and weight changes: ``python tests/fuzz`` looks for wrong answers and crashes."""
