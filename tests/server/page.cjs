// Uses the page of a running server as a visitor would: page.cjs URL [SCREENSHOTS]
//
// SCREENSHOTS is a folder for what it saw, in light and in dark. browser.sh installs what this needs.
"use strict";
const assert = require("node:assert");
const fs = require("node:fs");
const os = require("node:os");
const path = require("node:path");
const { chromium } = require("playwright-core");

const [url, screenshots] = process.argv.slice(2);
const flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"];

async function main() {
  const profile = fs.mkdtempSync(path.join(os.tmpdir(), "deepburn-page-"));
  const browser = await chromium.launchPersistentContext(profile, {
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    args: flags,
    viewport: { width: 1200, height: 800 },
  });
  try {
    const page = browser.pages()[0] ?? (await browser.newPage());
    const problems = [];
    page.on("pageerror", error => problems.push(String(error)));
    page.on("console", message => message.type() === "error" && problems.push(message.text()));
    page.on("request", request => {
      if (!request.url().startsWith(url) && !request.url().startsWith("data:")) problems.push(request.url());
    });
    await page.goto(url);
    await page.getByText(/tokens in \d+ answers/).waitFor();
    assert.equal(await page.locator("#loads").isHidden(), true);

    await page.getByLabel("New tokens").fill("60");
    await page.getByLabel("Temperature").fill("0");
    // What streams shows as a text that grows.
    await page.evaluate(() => {
      window.lengths = [];
      new MutationObserver(() => {
        const text = document.querySelector(".message.assistant p")?.textContent ?? "";
        if (text.length !== window.lengths.at(-1)) window.lengths.push(text.length);
      }).observe(document.getElementById("messages"), { subtree: true, childList: true, characterData: true });
    });
    await page.getByLabel("Message", { exact: true }).fill("Hello <b>world</b>");
    await page.keyboard.press("Enter");
    await page.locator(".message.assistant small", { hasText: /^\d+ tokens/ }).waitFor();
    assert.equal(await page.locator(".message.user p").textContent(), "Hello <b>world</b>");
    const lengths = await page.evaluate(() => window.lengths);
    assert.ok(lengths.length > 3, `the answer came in ${lengths.length} parts`);
    assert.ok(lengths.at(-1) > 0);

    // A second question, stopped half-way, then a new conversation.
    await page.getByLabel("New tokens").fill("2400");
    await page.getByLabel("Message", { exact: true }).fill("Again");
    const stopped = page.waitForFunction(() => {
      const button = document.getElementById("stop");
      button.click();
      return !button.disabled;
    });
    await page.getByRole("button", { name: "Send" }).click();
    await stopped;
    await page.locator(".message").nth(3).locator("small", { hasText: "stopped" }).waitFor();

    await page.locator("#loads").waitFor({ state: "visible" });
    const colours = await page.evaluate(() => {
      const canvas = document.getElementById("heatmap");
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      const seen = new Set();
      for (let at = 0; at < data.length; at += 4) seen.add(data.slice(at, at + 4).join());
      return { width: canvas.width, height: canvas.height, seen: seen.size };
    });
    assert.ok(colours.width > 1 && colours.height > 0 && colours.seen > 3, JSON.stringify(colours));
    assert.match(await page.locator("#heatmap").getAttribute("aria-label"), /Load of \d+ experts in \d+ layers/);
    await page.locator("#heatmap").hover();
    await page.getByText(/^Layer row \d+, expert \d+: /).waitFor();
    await page.locator("#running", { hasText: /^0 of/ }).waitFor();

    for (const colorScheme of screenshots ? ["light", "dark"] : []) {
      await page.emulateMedia({ colorScheme });
      await page.waitForTimeout(300);
      await page.screenshot({ path: path.join(screenshots, `page-${colorScheme}.png`) });
    }
    if (screenshots) {
      await page.setViewportSize({ width: 400, height: 800 });
      await page.screenshot({ path: path.join(screenshots, "page-narrow.png"), fullPage: true });
    }
    await page.getByRole("button", { name: "New conversation" }).click();
    assert.equal(await page.locator(".message").count(), 0);
    assert.deepEqual(problems, []);
    console.log(`chromium ${browser.browser()?.version() ?? ""}: the page works; ${lengths.length} parts, ${colours.seen} colours`);
  } finally {
    await browser.close();
    fs.rmSync(profile, { recursive: true, force: true });
  }
}

main().catch(error => {
  console.error(error);
  process.exit(1);
});
