"""Whether an answer declines to answer, in English or French, told by its words alone."""

from __future__ import annotations

import re

_OPENING = (
    r"(?:(?:i'?m |i am |je suis )?(?:so |very |really |vraiment )?(?:sorry|afraid|désolée?|navrée?)"
    r"|unfortunately|honestly|well|hmm+|oh|ah|no|je regrette|malheureusement|honnêtement|eh bien|hélas|my apologies"
    r"|i apologi[sz]e|excuse me|pardon|as an? (?:ai|artificial intelligence|language model)[^,.;]*"
    r"|en tant (?:qu'ia|que modèle)[^,.;]*|that'?s a (?:good|great|tough|hard|difficult) (?:question|one)|to be honest)"
    r"(?:[,.;!:…-]+|\s+(?:but|that|mais|que)\b|\s)\s*(?:but\s+|mais\s+|that\s+|que\s+)?"
)
_ENGLISH = (
    r"i (?:really |simply |just |honestly |actually )?(?:do not|don'?t|did not|didn'?t) (?:really |actually )?"
    r"(?:know|have (?:an?y?|the|enough|that|this|sufficient|access to|reliable)\b[^,.;]{0,30}?"
    r"(?:answer|information|knowledge|idea|data|clue|details))",
    r"i (?:have no|haven'?t an?y?|have not an?y?) (?:\w+ )?(?:idea|clue|answer|information|knowledge|comment)",
    r"i (?:can ?not|can'?t|am (?:un|not )able to|'?m (?:un|not )able to|could ?not|couldn'?t)"
    r" (?:\w+ )?(?:answer|say(?! enough)|tell|provide|give|help|recall|remember)",
    r"i(?: am|'?m) (?:really |just |simply )?(?:not (?:\w+ )?(?:sure|certain|aware|familiar)|unsure|uncertain)",
    r"i am not in a position to answer",
    r"i do not think i know",
    r"i don'?t think i know",
    r"i would be guessing",
    r"i'?d be guessing",
    r"(?:that|this) is (?:something|a question|beyond what|more than|not something) (?:that )?i"
    r"(?: do not| don'?t| can ?not| can'?t)? ?(?:know|answer|can answer)",
    r"(?:that|this|the answer) is (?:unknown to me|not known to me|beyond (?:my knowledge|what i know))",
    r"(?:no idea|dunno|don'?t know|not sure)(?=[.,;!]|$)",
)
_FRENCH = (
    r"je (?:ne |n'?)?(?:le |la |l'|en )?(?:sais|connais|peux|saurais|pourrais) (?:pas|rien|malheureusement pas)"
    r"(?: (?:vous |te |le |la |y )?(?:répondre|dire|donner|fournir))?",
    r"je (?:ne )?(?:l')?ignore",
    r"j'ai (?:bien )?peur de ne pas",
    r"(?:je n'ai|j'ai) (?:pas|aucune?|malheureusement pas|pas assez|pas la moindre)"
    r"[^,.;]{0,30}?(?:réponse|information|idée|connaissance)s?",
    r"je ne (?:suis pas (?:sûre?|certaine?|en mesure)|dispose pas)",
    r"je (?:ne )?suis (?:pas sûre?|pas certaine?|incapable)",
    r"je ne (?:me (?:souviens|rappelle)|m'en (?:souviens|rappelle)) (?:pas|plus)",
    r"(?:ça|cela|c'est (?:une chose|quelque chose)) (?:dépasse|que) (?:mes connaissances|je ne (?:sais|connais))",
    r"(?:aucune idée|pas la moindre idée|sais pas)",
)
_STARTS = re.compile(rf"(?:{_OPENING})*(?:{'|'.join((*_ENGLISH, *_FRENCH))})\b")
_TURNS = re.compile(
    r"(?:^|[\s,;:—–-])(?:but|however|though|although|still|yet|mais|cependant|toutefois|pourtant)\b[ ,]*"
)
_OFFERS = re.compile(
    r"(?:i|we|you|je|nous|vous|tu)\b.{0,12}\b(?:can|could|will|would|may|might|'ll|'d|hope|suggest|recommend|encourage|"
    r"peux|peut|pouvez|pourrais|pourriez|pourrait|conseille|espère|invite)\b(?! (?:guess|say that|dire que))"
    r"|(?:please|feel free|let me|perhaps you|maybe you|n'hésite[zs]?)\b"
)
_ANSWERS = re.compile(
    r"(?:i (?:think|believe|guess|suppose|would (?:say|guess)|'?d (?:say|guess))|my (?:best )?guess|probably|perhaps"
    r"|possibly|maybe|presumably|it(?:'s| is| was| might| may| could| must)\b"
    r"|(?:that|this|he|she|they)(?:'s| is| was| were)\b"
    r"|the (?:\w+ ){0,3}(?:answer|name|capital|author|number|year|date) (?:is|was)|the answer\b"
    r"|je (?:pense|crois|suppose|dirais)|peut-être|probablement|sans doute|c'(?:est|était)|il s'agit|la réponse"
    r"|ce (?:serait|doit être))"
)
_ABOUT_SELF = re.compile(
    r"(?:that|this|it)(?:'s| is| was) (?:not (?:something|in)|beyond|outside|something i|unknown to me)"
    r"|c'est (?:une chose|au-delà|hors)"
)
_SENTENCES = re.compile(r"(?<=[.!?…])[\s\"”»)]+|\n+|(?<=[a-zà-ÿ]);\s+")


def refuses(answer: str) -> bool:
    """Whether an answer says that it does not know or cannot answer, and gives no answer after all.

    "I don't know who wrote it." refuses; so does "Sorry, I have no idea. You could ask a librarian." "I don't know why
    people say Lyon, but the answer is Paris", "I'm not sure, but I think it is Paris" and "Nobody knows" do not: the
    first two answer, the third tells something of the world. An empty answer refuses nothing.

    The rule: the first sentence begins, after a "sorry" or the like, with a phrase of not knowing; what a "but" turns
    it to, and each later sentence, is an offer or an explanation, not an answer.
    """
    text = " ".join(_plain(answer).split(" ")).strip()
    if len(text) > 1 and text[0] in '"“«' and text[-1] in '"”»' and not re.search('["“”«»]', text[1:-1]):
        text = text[1:-1].strip()
    sentences = [part.strip() for part in _SENTENCES.split(text) if part.strip()]
    # "Sorry. I don't know." opens with a sentence of its own.
    while len(sentences) > 1 and re.fullmatch(rf"(?:{_OPENING})", sentences[0] + " "):
        sentences = sentences[1:]
    if not sentences:
        return False
    start = _STARTS.match(sentences[0])
    if start is None or sentences[0][start.end() :].lstrip()[:1] in tuple('"”»'):
        return False
    rest = sentences[0][start.end() :]
    if _turns_to_an_answer(rest) or re.search(r"[,;:—–] *(?:" + _ANSWERS.pattern + r")", rest):
        return False
    return not any(_is_answer(sentence) for sentence in sentences[1:])


def _turns_to_an_answer(rest: str) -> bool:
    """Whether what follows a "but" is more than an offer or one more refusal."""
    for turn in _TURNS.finditer(rest):
        after = rest[turn.end() :]
        if after and not (_OFFERS.match(after) or _STARTS.match(after)):
            return True
    return False


def _is_answer(sentence: str) -> bool:
    sentence = re.sub(r"^(?:but|however|still|so|and|mais|cependant|alors|et)\b[ ,]*", "", sentence)
    return bool(_ANSWERS.match(sentence)) and not (_ABOUT_SELF.match(sentence) or _STARTS.match(sentence))


def _plain(text: str) -> str:
    for sign in "’ʼ‘`´":
        text = text.replace(sign, "'")
    return text.replace("\u00a0", " ").replace("\u202f", " ").replace("*", "").casefold()
