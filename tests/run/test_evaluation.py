"""How good the policy is: what counts as right, on which questions."""

import math

import pytest
from helpers import completion, make_trainer

from utils.base.errors import UserError
from utils.run import evaluation


@pytest.fixture
def trainer(model_dir, data_dir, tmp_path):
    """Every other answer is right; every fourth completion was cut off."""
    made = make_trainer(model_dir, data_dir, tmp_path / "o", eval_samples=4)

    def answers(questions, **how):
        asked.append((questions, how))
        return [
            completion(
                [5],
                text=f"<answer>{q['answer'] if n % 2 else 'no'}</answer>",
                finish_reason="length" if n % 4 == 0 else "stop",
            )
            for n, q in enumerate(questions)
        ]

    asked, made.answers = [], answers
    made.asked = asked
    return made


def test_a_score_is_the_share_of_right_answers(trainer):
    result = evaluation.score(trainer, trainer.train_dataset[:8], temperature=1.0)
    assert result == {"em": 0.5, "em_subset": 8, "truncation_rate": 0.25}
    assert trainer.asked[0][1] == {"temperature": 1.0}


def test_an_evaluation_is_logged_with_where_the_run_is(trainer, tmp_path):
    trainer.run.state.update_step, trainer.run.state.step = 3, 6
    assert evaluation.evaluate(trainer, "test") == 0.5
    (record,) = trainer.run.state.history
    where = {"update": 3, "batch_step": 6, "split": "test"}
    assert record == {**where, "em": 0.5, "em_subset": 4, "truncation_rate": 0.25}
    trainer.args.eval_samples = 0
    assert math.isnan(evaluation.evaluate(trainer, "test")), "there is nothing to ask"
    assert len(trainer.run.state.history) == 1


def test_questions_of_ones_own_are_encoded_first(trainer):
    rows = [{"question": "How many?", "answer": "3", "prompt": [{"role": "user", "content": "x"}]}]
    assert evaluation.of_questions(trainer, rows * 4, 2)["em_subset"] == 2
    assert all(row["prompt_ids"] for row in trainer.asked[0][0])
    with pytest.raises(UserError, match="the data set holds no questions"):
        evaluation.of_questions(trainer, [], 0)
