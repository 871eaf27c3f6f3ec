"""A student that is made from the teacher, and the warm start: the teacher is trained before."""

import pytest
from tiny import assert_same_weights, tiny_bert, tiny_trainer

from ctcd_trainer import create_student, make_pair


def cut(teacher):
    return create_student(teacher, num_hidden_layers=2)


def test_a_function_makes_the_student_from_the_teacher(tmp_path):
    teacher = tiny_bert(3, seed=1)
    for pair in (
        tiny_trainer(tmp_path, model=teacher, student_model=cut).pair,
        tiny_trainer(tmp_path, model_init=lambda: teacher, student_model=cut).pair,
        make_pair(teacher, cut),
    ):
        assert_same_weights(pair.student, cut(teacher))
        assert pair.student.cut_layers == [0, 2]


def test_a_function_that_makes_no_student_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`student_model` has returned None, which is no model"):
        tiny_trainer(tmp_path, student_model=lambda teacher: None)
    with pytest.raises(ValueError, match="`model` and `student_model` are the same object"):
        tiny_trainer(tmp_path, student_model=lambda teacher: teacher)
    for function in (lambda: tiny_bert(2), lambda one, two: tiny_bert(2), lambda *, teacher: tiny_bert(2)):
        with pytest.raises(ValueError, match=r"is the function <lambda>.* takes the teacher and needs nothing else"):
            tiny_trainer(tmp_path, student_model=function)
