// Every word of the page, in English and French.

const WORDS = {
  en: {
    title: "Rank the answers",
    prompt: (at, total) => `Prompt ${at} of ${total}`,
    answers: "Answers",
    answer: (n) => `Answer ${n}`,
    yourOrder: "Your order",
    best: "best first",
    notRanked: "Not ranked",
    unranked: "not ranked",
    allRanked: "every answer is ranked",
    dropHere: "Press 1, 2, 3… from best to worst, or drag answers here",
    dragOrClick: "Drag to the board, or click to rank next",
    tie: "tie",
    tiesWith: (others) => `ties with ${others}`,
    submit: "Submit",
    submitSome: (n, total) => `Submit ${n} of ${total}`,
    doTie: "Tie",
    remove: "Remove",
    back: "Back",
    next: "Next",
    skip: "Skip",
    flag: "Flag",
    help: "Help",
    agreement: "Agreement",
    who: "Annotator",
    language: "Language",
    change: "Change annotator",
    done: (n, total) => `${n} of ${total} done`,
    pace: (time, left) => `${time} a prompt, about ${left} left`,
    twoNeeded: "Rank at least two answers, or skip the prompt.",
    saved: "Saved.",
    retrying: "Not saved yet: the server does not answer. Your ranking is kept and sent again.",
    lost: "The server does not answer. Trying again…",
    refused: (why) => `Not saved: ${why}`,
    wasRanked: "You ranked this prompt. Submit again to change it.",
    wasSkipped: "You skipped this prompt.",
    wasFlagged: (why) => `You flagged this prompt (${why}).`,
    allDone: "All prompts are done",
    thanks: "Thank you. Every ranking is saved. You may go back and change one.",
    askName: "Who ranks?",
    nameWhy: "Your name is written beside your rankings, and it is how you find your place again.",
    name: "Your name",
    start: "Start",
    cancel: "Cancel",
    close: "Close",
    flagTitle: "Flag this prompt",
    flagWhy: "It is left out of training and shown to whoever looks after the data.",
    flag_unclear: "The prompt is unclear or makes no sense",
    flag_unsafe: "Something is offensive or dangerous",
    flag_broken: "An answer is cut off or unreadable",
    flag_private: "It holds personal data",
    flag_other: "Something else",
    note: "Note (optional)",
    reasoning: "Reasoning",
    role_system: "System",
    role_developer: "System",
    role_user: "User",
    role_assistant: "Assistant",
    role_tool: "Tool",
    shortcuts: "Single-key shortcuts",
    key_number: "rank an answer next; pick one that is ranked",
    key_arrows: "move the picked answer",
    key_t: "tie it with the one above, or undo the tie",
    key_u: "take it out of the order",
    key_Enter: "submit",
    key_s: "skip",
    key_f: "flag",
    key_b: "back to the prompt before",
    key_n: "next prompt, nothing changed",
    key_Escape: "pick nothing",
    helpWhy: "Answers come without their origin and in a random order. What you cannot judge may stay unranked.",
    agreementWhy: "Kendall’s tau-b between each two people who ranked the same prompt: 1 is the same order, 0 no relation, −1 the reverse.",
    agreementOver: (pairs, prompts) => `comparisons: ${pairs}, prompts: ${prompts}`,
    noAgreement: "Nobody has ranked a prompt that somebody else ranked too.",
    ranked: "Ranked",
    skipped: "Skipped",
    flagged: "Flagged",
    median: "Median time",
    withOthers: "With others",
  },
  fr: {
    title: "Classer les réponses",
    prompt: (at, total) => `Question ${at} sur ${total}`,
    answers: "Réponses",
    answer: (n) => `Réponse ${n}`,
    yourOrder: "Votre classement",
    best: "la meilleure d’abord",
    notRanked: "Non classées",
    unranked: "non classée",
    allRanked: "toutes les réponses sont classées",
    dropHere: "Tapez 1, 2, 3… de la meilleure à la moins bonne, ou glissez les réponses ici",
    dragOrClick: "Glissez vers le classement, ou cliquez pour classer à la suite",
    tie: "ex æquo",
    tiesWith: (others) => `ex æquo avec ${others}`,
    submit: "Valider",
    submitSome: (n, total) => `Valider ${n} sur ${total}`,
    doTie: "Ex æquo",
    remove: "Retirer",
    back: "Retour",
    next: "Suivante",
    skip: "Passer",
    flag: "Signaler",
    help: "Aide",
    agreement: "Accord",
    who: "Annotateur",
    language: "Langue",
    change: "Changer d’annotateur",
    done: (n, total) => `${n} sur ${total} ${n > 1 ? "faites" : "faite"}`,
    pace: (time, left) => `${time} par question, encore ${left} environ`,
    twoNeeded: "Classez au moins deux réponses, ou passez la question.",
    saved: "Enregistré.",
    retrying: "Pas encore enregistré : le serveur ne répond pas. Votre classement est gardé et renvoyé.",
    lost: "Le serveur ne répond pas. Nouvel essai…",
    refused: (why) => `Non enregistré : ${why}`,
    wasRanked: "Vous avez classé cette question. Validez de nouveau pour changer.",
    wasSkipped: "Vous avez passé cette question.",
    wasFlagged: (why) => `Vous avez signalé cette question (${why}).`,
    allDone: "Toutes les questions sont faites",
    thanks: "Merci. Tous les classements sont enregistrés. Vous pouvez revenir en changer un.",
    askName: "Qui classe ?",
    nameWhy: "Votre nom est écrit à côté de vos classements ; il sert aussi à retrouver où vous en étiez.",
    name: "Votre nom",
    start: "Commencer",
    cancel: "Annuler",
    close: "Fermer",
    flagTitle: "Signaler cette question",
    flagWhy: "Elle est laissée hors de l’entraînement et montrée à qui s’occupe des données.",
    flag_unclear: "La question est obscure ou n’a pas de sens",
    flag_unsafe: "Un contenu est choquant ou dangereux",
    flag_broken: "Une réponse est coupée ou illisible",
    flag_private: "Il y a des données personnelles",
    flag_other: "Autre chose",
    note: "Note (facultative)",
    reasoning: "Raisonnement",
    role_system: "Système",
    role_developer: "Système",
    role_user: "Utilisateur",
    role_assistant: "Assistant",
    role_tool: "Outil",
    shortcuts: "Raccourcis à une touche",
    key_number: "classer une réponse à la suite ; prendre celle qui est classée",
    key_arrows: "déplacer la réponse prise",
    key_t: "la mettre ex æquo avec celle du dessus, ou défaire l’égalité",
    key_u: "la retirer du classement",
    key_Enter: "valider",
    key_s: "passer",
    key_f: "signaler",
    key_b: "revenir à la question d’avant",
    key_n: "question suivante, sans rien changer",
    key_Escape: "ne plus rien prendre",
    helpWhy: "Les réponses viennent sans leur origine et dans un ordre tiré au sort. Celles que vous ne pouvez pas juger peuvent rester non classées.",
    agreementWhy: "Tau-b de Kendall entre deux personnes qui ont classé la même question : 1 même ordre, 0 aucun lien, −1 ordre inverse.",
    agreementOver: (pairs, prompts) => `comparaisons : ${pairs}, questions : ${prompts}`,
    noAgreement: "Personne n’a encore classé une question déjà classée par quelqu’un d’autre.",
    ranked: "Classées",
    skipped: "Passées",
    flagged: "Signalées",
    median: "Temps médian",
    withOthers: "Avec les autres",
  },
};

export const LANGUAGES = Object.keys(WORDS);
let lang = "en";

export const language = () => lang;

/** Takes one of the languages, by default what the browser prefers, and fills the elements that name their words. */
export function speak(wanted) {
  const known = (name) => LANGUAGES.find((code) => name?.toLowerCase().startsWith(code));
  lang = known(wanted) ?? (navigator.languages ?? [navigator.language]).map(known).find(Boolean) ?? "en";
  document.documentElement.lang = lang;
  document.title = say("title");
  for (const element of document.querySelectorAll("[data-say]")) element.textContent = say(element.dataset.say);
  for (const element of document.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", say(element.dataset.label));
    element.title = say(element.dataset.label);
  }
}

export function say(key, ...values) {
  const word = WORDS[lang][key];
  return typeof word === "function" ? word(...values) : word;
}

export function ordinal(n) {
  if (lang === "fr") return n === 1 ? "1re" : `${n}e`;
  const ending = { one: "st", two: "nd", few: "rd", other: "th" };
  return `${n}${ending[new Intl.PluralRules("en", { type: "ordinal" }).select(n)]}`;
}

export const decimal = (x) =>
  new Intl.NumberFormat(lang, { minimumFractionDigits: 2, maximumFractionDigits: 2 }).format(x);

export function duration(seconds) {
  if (seconds < 99.5) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 100 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")}`;
}
