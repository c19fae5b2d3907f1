// An order of answers as tiers: a list of lists of answers, best first; answers of one list tie. Answers are numbers
// from 0; one that is in no tier is not ranked. Each function gives a new order and leaves its argument alone.

const sorted = (list) => [...list].sort((a, b) => a - b);
const emptied = (tiers, answer) => tiers.map((tier) => tier.filter((other) => other !== answer));
const filled = (tiers) => tiers.filter((tier) => tier.length > 0).map(sorted);

export const tierOf = (tiers, answer) => tiers.findIndex((tier) => tier.includes(answer));

export const remove = (tiers, answer) => filled(emptied(tiers, answer));

/** Alone at a gap: 0 is above the first tier, tiers.length below the last. */
export function insert(tiers, answer, gap) {
  const rest = emptied(tiers, answer);
  rest.splice(gap, 0, [answer]);
  return filled(rest);
}

export const append = (tiers, answer) => insert(tiers, answer, tiers.length);

/** Into a tier, to tie with what is there. */
export function join(tiers, answer, tier) {
  const rest = emptied(tiers, answer);
  rest[tier].push(answer);
  return filled(rest);
}

/** One step up (-1) or down (1): out of a tie first, else past the next tier. */
export function move(tiers, answer, step) {
  const at = tierOf(tiers, answer);
  if (at < 0) return append(tiers, answer);
  const alone = tiers[at].length === 1;
  if (alone && (at + step < 0 || at + step >= tiers.length)) return tiers;
  const gap = step < 0 ? at : at + 1;
  return insert(tiers, answer, alone ? gap + step : gap);
}

/** Ties with the tier above (the first one with the tier below); out of a tie, to stand alone below it. */
export function toggleTie(tiers, answer) {
  const at = tierOf(tiers, answer);
  if (at < 0) return tiers.length ? join(tiers, answer, tiers.length - 1) : append(tiers, answer);
  if (tiers[at].length > 1) return insert(tiers, answer, at + 1);
  if (tiers.length < 2) return tiers;
  return join(tiers, answer, at > 0 ? at - 1 : 1);
}

/** The rank of a tier: 1 + how many answers stand above it. */
export const rankOf = (tiers, tier) => 1 + tiers.slice(0, tier).flat().length;

export const count = (tiers) => tiers.flat().length;
