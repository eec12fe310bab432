"""Print how closely each test agreed with its oracle: what BUILD_NOTES records."""


def pytest_terminal_summary(terminalreporter):
    found = {
        report.nodeid: report.user_properties
        for report in terminalreporter.getreports("passed")
        if report.user_properties
    }
    if found:
        terminalreporter.section("agreement with the oracle")
    for name, properties in found.items():
        values = ", ".join(f"{key} {value:.1e}" for key, value in properties)
        terminalreporter.line(f"{name.rpartition('/')[2]}: {values}")
