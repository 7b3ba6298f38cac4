// What else there was in each state. Text from models and data only ever becomes text nodes.
{
  const data = JSON.parse(document.getElementById("data").textContent);
  const number = (value, digits) => value === null ? "–" : (value > 0 ? "+" : "") + value.toFixed(digits);

  function cell(tag, text) {
    const made = document.createElement(tag);
    made.textContent = text;
    return made;
  }

  function row(tag, ...texts) {
    const made = document.createElement("tr");
    made.append(...texts.map((text) => cell(tag, text)));
    return made;
  }

  function table(step) {
    const made = document.createElement("table");
    made.append(row("th", "token", "Q", "A", "p before", "p after"));
    for (const one of step.alternatives) {
      const line = row("td", one.text.replace(/^ | $/g, "␣"), number(one.q, 3), number(one.a, 4), one.before.toFixed(3), one.after.toFixed(3));
      line.classList.toggle("chosen", one.text === step.chosen.text && one.a === step.chosen.a);
      made.append(line);
    }
    return made;
  }

  for (const response of document.querySelectorAll(".response")) {
    const steps = data[response.dataset.response];
    const panel = response.querySelector(".panel"), chart = response.querySelector(".chart");
    const tokens = [...response.querySelectorAll(".tokens .token")];

    function look(t) {
      const step = steps[t];
      const value = step.value === null ? "" : `V ${number(step.value, 3)}, `;
      const instead = step.instead === null ? "" : `; before: “${step.instead}”`;
      panel.replaceChildren(cell("p", `Token ${t + 1}: ${value}log(π/π₀) ${number(step.nats, 2)} nats${instead}`), table(step));
      tokens.forEach((token, i) => token.classList.toggle("looked-at", i === t));
      chart.showAt(t + 1);
    }
    const sizes = steps.map((step) => Math.abs(step.nats));
    look(sizes.indexOf(Math.max(...sizes)));
    tokens.forEach((token, t) => {
      for (const event of ["pointerenter", "focus", "click"]) token.addEventListener(event, () => look(t));
    });
  }
}
