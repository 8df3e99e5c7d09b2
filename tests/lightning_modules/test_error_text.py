from pathlib import Path

from lightning_modules.error_text import MAX_LENGTH, one_line, reason, shorten_parser_error

UNION = """Parser key "trainer.callbacks":
  Does not validate against any of the Union subtypes
  Subtypes: [list[Callback], <class 'Callback'>, <class 'NoneType'>]
  Errors:
    - threshold (3.0) must be in [0, 1]
    - Not a valid subclass of Callback
      - a class path (str)
    - Expected a <class 'NoneType'>
  Given value type: <class 'list'>
  Given value: [{'class_path': 'DiversityMonitor'}]"""


def test_one_line_has_no_breaks_and_an_end() -> None:
    assert one_line("a\n  b\tc") == "a b c"
    assert len(one_line("x" * 1000)) == MAX_LENGTH


def test_the_reason_of_its_own_making_is_found_among_the_others() -> None:
    assert reason(UNION) == "threshold (3.0) must be in [0, 1]"
    assert shorten_parser_error(UNION, [], []) == "trainer.callbacks: threshold (3.0) must be in [0, 1]"


def test_a_text_of_another_kind_stays() -> None:
    assert shorten_parser_error("something\nelse", [], []) == "something else"


def test_the_nearest_key_is_spelt_as_its_place_wants_it(tmp_path: Path) -> None:
    keys = ["trainer.max_steps", "trainer.max_time", "model.network.d_model"]
    message = "unrecognized arguments: --trainer.max_step=3"
    assert shorten_parser_error(message, keys, []) == "unknown option '--trainer.max_step'; did you mean --trainer.max_steps?"
    config = tmp_path / "a.yaml"
    config.write_text("model: # dmodel\n  dmodel: 3\n")
    text = shorten_parser_error("Group 'network' does not accept option 'dmodel'", keys, [], [tmp_path / "missing", config])
    assert text == f"unknown key 'dmodel'; did you mean d_model? (in {config}, line 2)"
    assert shorten_parser_error("Option 'zzz' is not accepted", keys, []) == "unknown key 'zzz'"


def test_an_abstract_class_is_named_whichever_way_it_was_given() -> None:
    text = "class a.Task is abstract: name a class that derives from it"
    assert shorten_parser_error("Expected an instantiatable class, but a.Task is abstract", [], []) == text
    assert shorten_parser_error("Expected an instantiatable class, but is abstract\n  Given value: a.Task", [], []) == text
