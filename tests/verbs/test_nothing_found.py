"""What `predict` says where it found nothing."""

from instseg_jax.verbs.predict import SHOWN_CLASSES, nothing_found


def test_it_says_what_the_weights_know_and_where_the_threshold_was():
    said = nothing_found(("building", "balloon"), 0.4)
    assert "0.40" in said and "know building, balloon;" in said and "--threshold" in said


def test_of_many_classes_some_are_named():
    names = [f"class{i}" for i in range(80)]
    said = nothing_found(names, 0.25)
    assert f"class{SHOWN_CLASSES - 1} and {80 - SHOWN_CLASSES} more" in said and f"class{SHOWN_CLASSES}" not in said
