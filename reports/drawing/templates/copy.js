// Copies the commands. Where a page may not write to the clipboard they are selected, ready for the keyboard.
for (const button of document.querySelectorAll("button.copy")) {
  const text = button.parentElement.querySelector("pre");
  const say = (word) => { button.textContent = word; setTimeout(() => { button.textContent = "copy"; }, 2000); };
  const select = () => { getSelection().selectAllChildren(text); say("selected"); };
  button.addEventListener("click", () => {
    if (navigator.clipboard) navigator.clipboard.writeText(text.textContent.trim()).then(() => say("copied"), select);
    else select();
  });
}
