"""The page in Chromium."""

import contextlib
import os
import time
from pathlib import Path


SECONDS = 280  # until something must have appeared, on a busy machine
SQUARES = 576


class Visitor:
    """A Chromium of one visitor at the page."""

    def __init__(self, url, width=1280, height=1700):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
            options.add_argument(argument)
        options.binary_location = "/usr/bin/chromium"
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.driver.get(url)
        self.wait(lambda: self.count("#picture rect") == SQUARES and self.count("#strip figure") == 4)

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def count(self, selector):
        return self.driver.execute_script("return document.querySelectorAll(arguments[0]).length", selector)

    def text(self, selector):
        script = "const e = document.querySelector(arguments[0]); return e ? (e.value || e.textContent) : ''"
        return self.driver.execute_script(script, selector).strip()

    def wait(self, is_true):
        end = time.monotonic() + SECONDS
        while not is_true():
            assert time.monotonic() < end, self.text("#status")
            time.sleep(0.2)

    def ask(self, question=None):
        if question is not None:
            self.type(question)
        self.driver.execute_script("document.querySelector('#status .ps-status').textContent = ''")
        self.find("#ask").click()
        self.wait(lambda: self.text("#status").startswith("Done"))
        return self.text("#full textarea"), self.text("#kept textarea")

    def type(self, question):
        from selenium.webdriver.common.keys import Keys

        box = self.find("#question textarea, #question input")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(Keys.BACKSPACE, question)

    def picture(self):
        return self.driver.execute_script("return document.querySelector('#picture image').outerHTML")

    def example(self, label):
        before = self.picture()
        self.driver.find_element("xpath", f"//button[contains(., '{label}')]").click()
        self.wait(lambda: self.picture() != before)

    def upload(self, path):
        before = self.picture()
        self.find("#file input[type=file]").send_keys(str(path))
        self.wait(lambda: self.picture() != before)

    def show(self, name):
        folder = os.environ.get("APP_SCREENSHOTS")
        if folder:
            self.driver.save_screenshot(str(Path(folder, f"{name}.png")))


@contextlib.contextmanager
def visit(page, **screen):
    visitor = Visitor(page[0], **screen)
    try:
        yield visitor
    finally:
        visitor.driver.quit()
