// A small test framework: TEST registers, CHECK counts, run_tests() runs every test of the program once per instruction
// set of this machine and build (the core chooses once per process, so each set runs in its own process).
//
//   E2CM_ISA=avx2            only this instruction set
//   E2CM_TEST_EFFORT=0.1     a tenth of the random cases; default: 1, AddressSanitizer 0.15, Arm (usually qemu) 0.05
//   E2CM_TEST_ONLY=ties      only tests with this in their name
#pragma once

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "api.h"

#ifndef _WIN32
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace e2cm::test {

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Registration {
  Registration(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

struct State {
  long long checks = 0;
  int failures = 0;
  std::string context;  // the current case, printed with a failure
};

inline State& state() {
  static State only;
  return only;
}

inline void fail(const char* file, int line, const std::string& what) {
  if (++state().failures > 20) return;  // enough to see the problem
  std::printf("%s:%d: %s\n    in %s\n", file, line, what.c_str(), state().context.c_str());
}

inline double effort() {
#if defined(__aarch64__) && !defined(__APPLE__)
  constexpr double usual = 0.05;
#elif defined(__SANITIZE_ADDRESS__)
  constexpr double usual = 0.15;
#else
  constexpr double usual = 1;
#endif
  const char* const text = std::getenv("E2CM_TEST_EFFORT");
  return text ? std::atof(text) : usual;
}

inline int run_tests_here() {
  const auto start = std::chrono::steady_clock::now();
  const char* const only = std::getenv("E2CM_TEST_ONLY");
  for (const Test& test : tests()) {
    if (only && !std::strstr(test.name, only)) continue;
    state().context = test.name;
    const int before = state().failures;
    try {
      test.body();
    } catch (const std::exception& error) {
      fail(test.name, 0, std::string("threw ") + error.what());
    }
    if (state().failures > before) std::printf("FAILED: %s\n", test.name);
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("%s: %lld checks, %d failures, %.1f s\n", isa_in_use(), state().checks, state().failures, seconds);
  std::fflush(stdout);
  return state().failures ? 1 : 0;
}

inline std::vector<std::string> levels() {
  std::vector<std::string> all;
  std::string rest = isa_available();
  for (size_t comma; (comma = rest.find(',')) != std::string::npos; rest.erase(0, comma + 1))
    all.push_back(rest.substr(0, comma));
  all.push_back(rest);
  return all;
}

#ifdef _WIN32
inline int run_tests() { return run_tests_here(); }  // only E2CM_ISA, or the best instruction set
#else
// Runs body in a child process with this instruction set; returns its exit status, or 128 + the signal that ended it.
template <class Body>
int in_child(const std::string& isa, const Body& body) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child < 0) return std::perror("fork"), 127;
  if (child == 0) {
    setenv("E2CM_ISA", isa.c_str(), 1);
    std::exit(body());
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

inline int run_tests() {
  if (std::getenv("E2CM_ISA")) return run_tests_here();
  bool failed = false;
  for (const std::string& isa : levels()) {
    const int status = in_child(isa, run_tests_here);
    if (status != 0) std::printf("%s: FAILED with status %d\n", isa.c_str(), status);
    failed |= status != 0;
  }
  return failed ? 1 : 0;
}
#endif

}  // namespace e2cm::test

#define TEST(name)                                                         \
  static void name();                                                      \
  static const e2cm::test::Registration name##_registration(#name, &name); \
  static void name()

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    ++e2cm::test::state().checks;                                                        \
    if (!(condition)) e2cm::test::fail(__FILE__, __LINE__, "check failed: " #condition); \
  } while (0)

// CHECK_CLOSE(got, wanted, slack): two NaNs, and two equal infinities, are close.
#define CHECK_CLOSE(got, wanted, slack)                                                                                \
  do {                                                                                                                 \
    ++e2cm::test::state().checks;                                                                                      \
    const double got_ = (got), wanted_ = (wanted), slack_ = (slack);                                                   \
    const double off_ = got_ > wanted_ ? got_ - wanted_ : wanted_ - got_;                                              \
    if (!(off_ <= slack_ || got_ == wanted_ || (got_ != got_ && wanted_ != wanted_))) {                                \
      char text_[400];                                                                                                 \
      std::snprintf(text_, sizeof text_, "%s is %.9g, not %.9g: off by %.3g, allowed %.3g", #got, got_, wanted_, off_, \
                    slack_);                                                                                           \
      e2cm::test::fail(__FILE__, __LINE__, text_);                                                                     \
    }                                                                                                                  \
  } while (0)

#define CHECK_THROWS(type, expression)                                                           \
  do {                                                                                           \
    ++e2cm::test::state().checks;                                                                \
    bool thrown_ = false;                                                                        \
    try {                                                                                        \
      expression;                                                                                \
    } catch (const type&) {                                                                      \
      thrown_ = true;                                                                            \
    }                                                                                            \
    if (!thrown_) e2cm::test::fail(__FILE__, __LINE__, "did not throw " #type ": " #expression); \
  } while (0)
