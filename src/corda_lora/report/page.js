document.getElementById("theme").onclick = () => {
  const dark = document.documentElement.style.colorScheme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  document.documentElement.style.colorScheme = dark === "dark" ? "light" : "dark";
};

// --- sorting: any table, by the heading clicked; what has no value stays last

document.addEventListener("click", (event) => {
  const th = event.target.closest("thead button")?.parentElement;
  if (!th) return;
  const table = th.closest("table"), heads = [...table.querySelectorAll("thead th:not([colspan])")];
  const column = heads.indexOf(th), up = th.ariaSort ? th.ariaSort === "descending" : th.dataset.better !== "high";
  const key = (row) => row.cells[column].dataset.key;
  const sign = up ? 1 : -1;
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [u, v] = [key(a), key(b)];
    if (u === undefined || v === undefined) return (u === undefined) - (v === undefined);
    return sign * (isNaN(u) || isNaN(v) ? u.localeCompare(v) : u - v);
  });
  heads.forEach((h) => h.removeAttribute("aria-sort"));
  th.setAttribute("aria-sort", up ? "ascending" : "descending");
  table.tBodies[0].append(...rows);
});
