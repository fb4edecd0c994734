"""`fastlora bench`: arms in processes of their own, equal work, correctness before speed."""
