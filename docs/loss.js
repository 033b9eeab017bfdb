// The rule "loss-at-logarithm" of the doctor for a page: which number of candidates has this loss as its logarithm?
"use strict";

const TOLERANCE = 0.02; // nats

/** What the mean of the numbers in a text says, given the rows of a batch (or null). */
function meaning(text, rows) {
  const numbers = (text.match(/-?(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?/gi) || []).map(Number);
  if (!numbers.length) return "";
  const loss = numbers.reduce((sum, each) => sum + each, 0) / numbers.length;
  const lines = numbers.length > 1 ? [`Mean of ${numbers.length} numbers: ${loss.toFixed(4)}.`] : [];
  if (loss < 0) return lines.concat("A contrastive loss is not negative: is this a different term, or a similarity?").join("\n");
  if (loss === 0) {
    return lines.concat("A loss of exactly 0: one candidate (a batch of one, all others masked), no row with a positive, or "
      + "no gradient. Nothing is learned.").join("\n");
  }
  const candidates = Math.exp(loss);
  const known = [2, ...Array.from({length: 18}, (_, i) => 2 ** (i + 3))];
  const nearest = known.find((n) => Math.abs(Math.log(n) - loss) <= TOLERANCE);
  const number = (n) => Math.round(n).toLocaleString("en");
  if (rows > 1) {
    const level = Math.log(rows);
    const times = Math.round(candidates / rows);
    if (Math.abs(loss - level) <= TOLERANCE) {
      lines.push(`ln ${number(rows)} is ${level.toFixed(4)}: the model guesses among the rows of its batch.`);
    } else if (times > 1 && Math.abs(Math.log(times * rows) - loss) <= TOLERANCE) {
      lines.push(`ln ${number(times * rows)} is ${Math.log(times * rows).toFixed(4)}: ${times} times the batch, as with ${times} `
        + "processes or columns of negatives. The model guesses among all of them.");
    } else if (loss > level) {
      lines.push(`Above ln ${number(rows)} = ${level.toFixed(4)}: worse than guessing in a batch of ${number(rows)}, or there are more `
        + "candidates than that (negatives, a queue, other processes).");
    } else {
      lines.push(`Below ln ${number(rows)} = ${level.toFixed(4)}, the loss of guessing: the probability of the positive is `
        + `${Math.exp(-loss).toPrecision(2)} where guessing has ${(1 / rows).toPrecision(2)}.`);
    }
  } else if (nearest === 2) {
    lines.push(`ln 2 is ${Math.log(2).toFixed(4)}: a yes-or-no question is guessed (a sigmoid for each pair, or one negative `
      + "for each query).");
  } else if (nearest) {
    lines.push(`${loss} is ln ${number(nearest)} (${Math.log(nearest).toFixed(4)}): if it stays there, one of ${number(nearest)} `
      + "candidates is guessed: the rows of a batch times the processes that share them, or a queue of negatives.");
  } else {
    lines.push(`e^loss is ${candidates < 100 ? candidates.toFixed(1) : number(candidates)}: as good as guessing among so many `
      + "candidates. Say how many rows a batch has.");
  }
  if (nearest || rows > 1) {
    lines.push("If it stands still at the level of guessing: are weights frozen or a side detached? Do rows of both sides "
      + "belong together? Is the learning rate 0 or too high? Have the embeddings collapsed (mean cosine near 1)?");
  }
  return lines.join("\n");
}

if (typeof document !== "undefined") {
  const [loss, batch, answer] = ["loss", "batch", "answer"].map((id) => document.getElementById(id));
  const show = () => {
    answer.textContent = meaning(loss.value, Number(batch.value) || 0);
  };
  loss.addEventListener("input", show);
  batch.addEventListener("input", show);
}
if (typeof module !== "undefined") module.exports = {meaning};
