#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <filesystem>
#include <functional>
#include <map>
#include <system_error>

#include "cpp/file.h"
#include "tests/cpp/temp_dir.h"

namespace {

std::vector<std::string>* synced_paths = nullptr;  // null: nobody wants to know

}  // namespace

// Takes the C library's place in this program.
extern "C" int fsync(int fd) {
  if (synced_paths != nullptr)
    synced_paths->push_back(
        std::filesystem::read_symlink("/proc/self/fd/" + std::to_string(fd)).string());
  return static_cast<int>(::syscall(SYS_fsync, fd));
}

namespace pccheck::test {
namespace {

std::vector<std::string> synced_by(const std::function<void()>& call) {
  std::vector<std::string> paths;
  synced_paths = &paths;
  call();
  synced_paths = nullptr;
  return paths;
}

template <typename Call>
int errno_of(Call call) {
  try {
    call();
  } catch (const std::system_error& error) {
    return error.code().value();
  }
  return 0;
}

class PosixDirectory : public testing::Test {
 protected:
  TempDir temp;
  std::unique_ptr<Directory> directory = open_posix_directory(temp.path(), false);
  std::unique_ptr<Directory> second = open_posix_directory(temp.path(), false);
};

TEST_F(PosixDirectory, IsMadeWithItsParentsWhereThatIsWanted) {
  EXPECT_EQ(errno_of([&] { open_posix_directory(temp / "a/b/c", false); }), ENOENT);
  EXPECT_EQ(open_posix_directory(temp / "a/b/c", true)->path(), temp / "a/b/c");
  open_posix_directory(temp / "a/b/c", true);
  write_file(temp / "file", {});
  EXPECT_EQ(errno_of([&] { open_posix_directory(temp / "file", true); }), ENOTDIR);
}

TEST_F(PosixDirectory, EveryParentOfOneThatWasMadeIsSynced) {
  using Paths = std::vector<std::string>;
  const std::string top = std::filesystem::canonical(temp.path());
  const auto make = [&](const std::string& path) {
    return synced_by([&] { open_posix_directory(path, true); });
  };
  EXPECT_EQ(make(top + "/a/b/c"), (Paths{top, top + "/a", top + "/a/b"}));
  EXPECT_EQ(make(top + "/a/b/c"), Paths{}) << "it was there already";
  EXPECT_EQ(make(top + "/a/b/d/"), (Paths{top + "/a/b"}));
  EXPECT_EQ(make(top + "/new/../a/b/e"), (Paths{top, top + "/a/b"}));
  ::symlink("a", (temp / "link").c_str());
  EXPECT_EQ(make(top + "/link/f"), (Paths{top + "/a"}));
  const std::filesystem::path before = std::filesystem::current_path();
  std::filesystem::current_path(top);
  EXPECT_EQ(make("relative"), (Paths{top}));
  std::filesystem::current_path(before);
}

TEST_F(PosixDirectory, ListsWhatIsThereByKind) {
  write_file(temp / "file", {});
  write_file(temp / ".hidden", {});
  ::mkdir((temp / "directory").c_str(), 0700);
  ::symlink("file", (temp / "link").c_str());
  ::symlink("directory", (temp / "link to directory").c_str());
  ::mkfifo((temp / "fifo").c_str(), 0600);
  for (int time = 0; time < 2; ++time) {
    std::map<std::string, EntryKind> found;
    for (const Entry& entry : directory->list()) found[entry.name] = entry.kind;
    EXPECT_EQ(found, (std::map<std::string, EntryKind>{{"file", EntryKind::file},
                                                       {".hidden", EntryKind::file},
                                                       {"directory", EntryKind::directory},
                                                       {"link", EntryKind::other},
                                                       {"link to directory", EntryKind::other},
                                                       {"fifo", EntryKind::other}}));
  }
}

TEST_F(PosixDirectory, OnlySingleNamesAreTaken) {
  using namespace std::string_literals;
  for (const std::string& name : {""s, "."s, ".."s, "a/b"s, "/a"s, "a/"s, "../a"s, "a\0b"s}) {
    EXPECT_THROW(directory->open_file(name), std::invalid_argument) << name;
    EXPECT_THROW(directory->create_file(name), std::invalid_argument) << name;
    EXPECT_THROW(directory->reuse_file(name), std::invalid_argument) << name;
    EXPECT_THROW(directory->open_directory(name), std::invalid_argument) << name;
    EXPECT_THROW(directory->create_directory(name), std::invalid_argument) << name;
    EXPECT_THROW(directory->exists(name), std::invalid_argument) << name;
    EXPECT_THROW(directory->rename(name, "x"), std::invalid_argument) << name;
    EXPECT_THROW(directory->rename("x", name), std::invalid_argument) << name;
    EXPECT_THROW(directory->replace(name, "x"), std::invalid_argument) << name;
    EXPECT_THROW(directory->replace("x", name), std::invalid_argument) << name;
    EXPECT_THROW(directory->remove_file(name), std::invalid_argument) << name;
    EXPECT_THROW(directory->remove_directory(name), std::invalid_argument) << name;
    EXPECT_THROW(directory->try_lock_file(name), std::invalid_argument) << name;
    EXPECT_THROW(directory->leads_to(name, *directory), std::invalid_argument) << name;
  }
  EXPECT_TRUE(names_in(temp.path()).empty());
}

TEST_F(PosixDirectory, RenamingNeverReplacesAndReplacingDoes) {
  write_file(temp / "a", to_bytes("a"));
  write_file(temp / "b", to_bytes("b"));
  ::mkdir((temp / "empty").c_str(), 0700);
  ::mkdir((temp / "other").c_str(), 0700);
  EXPECT_EQ(errno_of([&] { directory->rename("a", "b"); }), EEXIST);
  EXPECT_EQ(errno_of([&] { directory->rename("other", "empty"); }), EEXIST);
  EXPECT_EQ(errno_of([&] { directory->rename("missing", "c"); }), ENOENT);
  EXPECT_EQ(read_file(temp / "b"), to_bytes("b"));
  directory->replace("a", "b");
  EXPECT_EQ(read_file(temp / "b"), to_bytes("a"));
  directory->rename("b", "c");
  EXPECT_TRUE(directory->exists("c"));
  EXPECT_FALSE(directory->exists("b"));
  directory->sync();
}

TEST_F(PosixDirectory, NamesAreResolvedAgainstTheDirectoryItself) {
  const std::unique_ptr<Directory> child = directory->create_directory("child");
  directory->rename("child", "moved");
  ::mkdir((temp / "child").c_str(), 0700);  // somebody puts another in its place
  child->create_file("f");
  EXPECT_EQ(names_in(temp / "moved"), std::vector<std::string>{"f"});
  EXPECT_TRUE(names_in(temp / "child").empty());
  EXPECT_TRUE(directory->leads_to("moved", *child));
  EXPECT_FALSE(directory->leads_to("child", *child));
  EXPECT_FALSE(directory->leads_to("missing", *child));
  ::symlink("moved", (temp / "link").c_str());
  EXPECT_FALSE(directory->leads_to("link", *child));
  EXPECT_EQ(errno_of([&] { directory->open_directory("link"); }), ENOTDIR);
}

TEST_F(PosixDirectory, LocksHoldBetweenTwoOpeningsInOneProcess) {
  EXPECT_TRUE(directory->try_lock(LockMode::shared));
  EXPECT_TRUE(second->try_lock(LockMode::shared));
  EXPECT_FALSE(open_posix_directory(temp.path(), false)->try_lock(LockMode::exclusive));
  directory->unlock();
  second->unlock();
  EXPECT_TRUE(directory->try_lock(LockMode::exclusive));
  EXPECT_FALSE(second->try_lock(LockMode::shared));
  EXPECT_FALSE(second->try_lock(LockMode::exclusive));
  directory.reset();
  EXPECT_TRUE(second->try_lock(LockMode::exclusive));
}

TEST_F(PosixDirectory, ALockFileIsHeldByOneUntilItIsLetGo) {
  std::unique_ptr<File> held = directory->try_lock_file(".lock");
  ASSERT_TRUE(held);
  EXPECT_EQ(second->try_lock_file(".lock"), nullptr);
  EXPECT_EQ(directory->try_lock_file(".lock"), nullptr);
  held.reset();
  EXPECT_NE(second->try_lock_file(".lock"), nullptr);
  EXPECT_EQ(names_in(temp.path()), std::vector<std::string>{".lock"});
}

TEST_F(PosixDirectory, ALockFileThatIsNotAFileIsRefused) {
  ::symlink("elsewhere", (temp / ".lock").c_str());
  EXPECT_EQ(errno_of([&] { directory->try_lock_file(".lock"); }), ELOOP);
  EXPECT_EQ(names_in(temp.path()), std::vector<std::string>{".lock"});
}

TEST_F(PosixDirectory, RemovingATreeTakesFilesAndLinksAndReportsTheRest) {
  ::mkdir((temp / "tree").c_str(), 0700);
  write_file(temp / "outside", to_bytes("stays"));
  write_file(temp / "tree/file", {});
  ::symlink("../outside", (temp / "tree/link").c_str());
  remove_tree(*directory, "tree");
  EXPECT_FALSE(directory->exists("tree"));
  EXPECT_EQ(read_file(temp / "outside"), to_bytes("stays"));

  ::mkdir((temp / "tree").c_str(), 0700);
  ::mkdir((temp / "tree/inner").c_str(), 0700);
  write_file(temp / "tree/inner/file", {});
  EXPECT_EQ(errno_of([&] { remove_tree(*directory, "tree"); }), ENOTEMPTY);
  EXPECT_TRUE(std::filesystem::exists(temp / "tree/inner/file"));
}

TEST_F(PosixDirectory, WhatIsMissingOrInTheWayIsNamed) {
  EXPECT_EQ(errno_of([&] { directory->open_directory("missing"); }), ENOENT);
  EXPECT_EQ(errno_of([&] { directory->remove_file("missing"); }), ENOENT);
  EXPECT_EQ(errno_of([&] { directory->remove_directory("missing"); }), ENOENT);
  write_file(temp / "file", {});
  EXPECT_EQ(errno_of([&] { directory->open_directory("file"); }), ENOTDIR);
  EXPECT_EQ(errno_of([&] { directory->create_directory("file"); }), EEXIST);
  ::symlink("nowhere", (temp / "dangling").c_str());
  EXPECT_TRUE(directory->exists("dangling"));
  try {
    directory->open_directory("missing");
  } catch (const std::system_error& error) {
    EXPECT_NE(std::string(error.what()).find(temp / "missing"), std::string::npos);
  }
}

}  // namespace
}  // namespace pccheck::test
