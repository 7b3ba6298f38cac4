// The browser of responses. Text from models and data only ever becomes text nodes.
{
  const { labels, before, after, samples } = JSON.parse(document.getElementById("data").textContent);
  const field = (id) => document.getElementById(id);
  const PAGE = 20;
  let shown = PAGE;

  const scoreOf = (sample, system) => sample.scores[field("score").value][system];
  const gainOf = (sample) => scoreOf(sample, after) - scoreOf(sample, before);
  const ORDERS = {
    gain: (a, b) => gainOf(b) - gainOf(a),
    loss: (a, b) => gainOf(a) - gainOf(b),
    low: (a, b) => scoreOf(a, after) - scoreOf(b, after),
  };
  for (const sample of samples)
    sample.all = [sample.source, ...sample.references, ...sample.responses].join("\n").toLowerCase();

  function element(tag, name, text) {
    const made = document.createElement(tag);
    made.className = name;
    made.textContent = text;
    return made;
  }

  // The words of `text` with those marked that are not in the longest common subsequence with `other`.
  function marked(text, other) {
    const line = element("div", "text", "");
    const a = text.split(/(\s+)/).filter((w) => w.trim()), b = other.split(/\s+/);
    if (a.length * b.length > 250000) { line.textContent = text; return line; }
    const common = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
    for (let i = a.length - 1; i >= 0; i--)
      for (let j = b.length - 1; j >= 0; j--)
        common[i][j] = a[i] === b[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
    let i = 0, j = 0;
    for (const piece of text.split(/(\s+)/)) {
      if (!piece.trim()) { line.append(piece); continue; }
      while (j < b.length && a[i] !== b[j] && common[i][j + 1] === common[i][j]) j++;
      const kept = j < b.length && a[i] === b[j];
      line.append(kept ? piece : element("mark", "", piece));
      if (kept) j++;
      i++;
    }
    return line;
  }

  function row(kind, label, tone, text, score = "") {
    const line = element("div", "row " + kind, "");
    line.append(element("div", "label " + tone, label), text, element("div", "score soft", score));
    return line;
  }

  function card(sample) {
    const box = element("article", "sample", "");
    const plain = (text) => text ? element("div", "text", text) : element("div", "text soft", "(empty)");
    box.append(row("given source", sample.task || "source", "soft", plain(sample.source), "no. " + sample.number));
    sample.references.forEach((reference, k) =>
      box.append(row("given", k ? "" : "references", "soft", plain(reference))));
    labels.forEach(({ name, ink }, system) => {
      const response = sample.responses[system];
      const text = system === after ? marked(response, sample.responses[before]) : plain(response);
      const score = scoreOf(sample, system), gain = gainOf(sample);
      const shown = field("score").value === "length_words" ? score : (100 * score).toFixed(1);
      // What an untrained model says is seldom worth the room.
      const line = row(ink === "start" && system !== before ? "aside" : "", name, ink, text, shown);
      if (system === after && gain) line.lastChild.classList.replace("soft", gain > 0 ? "good" : "bad");
      box.append(line);
    });
    return box;
  }

  function show() {
    const wanted = field("search").value.toLowerCase();
    const found = samples.filter((sample) => sample.all.includes(wanted));
    const order = ORDERS[field("order").value];
    if (order) found.sort(order);
    field("samples").replaceChildren(...found.slice(0, shown).map(card));
    field("count").textContent = found.length + (found.length === 1 ? " example" : " examples");
    field("more").hidden = found.length <= shown;
  }
  function restart() { shown = PAGE; show(); }
  for (const id of ["search", "order", "score"]) field(id).addEventListener("input", restart);
  field("more").addEventListener("click", () => { shown += PAGE; show(); });
  show();
}
