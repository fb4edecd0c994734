from fastlora.errors import FastloraError, GateError, RecipeError, UsageError


def test_recipe_error_reports_every_problem_with_its_file() -> None:
    error = RecipeError("my.toml", ["lora.rank: must be positive", "train.lr: missing"])
    assert str(error) == "my.toml: lora.rank: must be positive\nmy.toml: train.lr: missing"
    assert error.problems == ("lora.rank: must be positive", "train.lr: missing")


def test_exit_codes() -> None:
    assert (FastloraError.exit_code, UsageError.exit_code, GateError.exit_code) == (1, 2, 3)
    assert RecipeError("a", ["b"]).exit_code == 2
