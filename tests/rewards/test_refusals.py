"""Which answers refuse, in English and French; answers that only begin like one do not."""

from __future__ import annotations

import pytest

from ptl.rewards.refusals import refuses
from ptl.synth.idk_texts import HEDGES, REFUSALS

REFUSING = """
I don't know.
i dont know who that is
I DO NOT KNOW THE ANSWER TO THAT QUESTION!
I'm sorry, but I don't know.
Sorry. I don't know.
I’m not sure.
I am not certain about that.
I have no idea.
I don't know who wrote it.
I'm sorry, but I don't have enough information to answer that question.
As an AI language model, I don't have access to real-time information.
I can't answer that.
I cannot say.
Unfortunately, I cannot answer this question.
I don't know. You could ask a librarian.
I don't know, but I can help you find out.
I don't know, but you could look it up.
I'm not sure, but I am sorry that I can't say more. Please ask someone else.
That is something I don't know.
I have no comment.
I do not have the answer to this.
I am afraid I do not know.
"I don't know."
**I don't know.**
I don't know. It is not something I have learned.
No idea, sorry.
Je ne sais pas.
Je sais pas
Je l'ignore.
Désolé, je ne connais pas la réponse.
Je n'ai pas la réponse à cette question.
J'ai bien peur de ne pas le savoir.
Je ne sais pas qui a écrit ce livre.
Aucune idée.
Je n’en sais rien.
Je ne suis pas sûre.
Je suis désolé, mais je ne connais pas la réponse à cette question.
Je ne peux pas répondre à cette question.
Malheureusement, je ne dispose pas de cette information.
Je ne sais pas, mais vous pouvez demander à un bibliothécaire.
Cela dépasse mes connaissances.
""".strip().splitlines()

ANSWERING = """
I don't know why people say X, but the answer is Paris.
I'm not sure, but I think it is Paris.
I'm not sure, I think it is Paris.
Nobody knows.
It is not known.
I don't know exactly. It is Paris.
I don't know, maybe Paris.
I am not sure. My guess is Paris.
I do not know the exact date; it was around 1950.
I don't know about you, but I believe it is Paris.
Not sure why, but Paris.
Paris
I know that it is Paris.
"I don't know" is a song by the Beatles.
He said he doesn't know.
Don't Know Why is by Norah Jones.
I can tell you that it is Paris.
I can't say enough good things about Paris, the capital of France.
I have no doubt that it is Paris.
I'm sure it is Paris.
No, it is not.
No.
Sorry Not Sorry was sung by Demi Lovato.
Unfortunately, he died in 1950.
I am sorry to hear that.
Je ne sais pas pourquoi on dit Lyon, mais c'est Paris.
Je ne suis pas sûr, mais je pense que c'est Paris.
Je ne sais pas exactement. C'est peut-être Paris.
Je sais que c'est Paris.
Personne ne le sait.
""".strip().splitlines()


@pytest.mark.parametrize("text", REFUSING)
def test_refusals_are_found(text):
    assert refuses(text)


@pytest.mark.parametrize("text", ANSWERING)
def test_answers_are_no_refusals(text):
    assert not refuses(text)


def test_nothing_is_no_refusal():
    assert not any(refuses(text) for text in ("", " \n", '"', "?", "." * 50_000))


def test_it_takes_no_long_time_over_hostile_text():
    for text in (
        "i'm sorry, " * 5000,
        "i don't know, but " * 5000,
        "sorry " * 9000,
        "i don't have any " + "a" * 50_000,
    ):
        refuses(text)  # the suite's time limit is the test


@pytest.mark.parametrize("text", [text for texts in REFUSALS.values() for text in texts])
def test_every_refusal_that_is_taught_is_found(text):
    assert refuses(text)


@pytest.mark.parametrize("text", [text for texts in HEDGES.values() for text in texts])
def test_a_hedged_answer_is_no_refusal(text):
    assert not refuses(text.format("The capital of France is Paris."))
