-- KEYS: the value, the token it was written with.
-- ARGV: the value, the token, and how long each is kept in milliseconds.
-- Tokens are compared as text: a number here is not exact above 2^53.
local last = redis.pcall('GET', KEYS[2])
if type(last) == 'string' and #last <= 20 and string.match(last, '^[1-9]%d*$') then
  local mine = ARGV[2]
  if #last > #mine or (#last == #mine and last > mine) then
    return last
  end
end
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[4])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
return false
